"""Memory: how a run may use it, what it will take, and what to choose so that it fits a budget."""
