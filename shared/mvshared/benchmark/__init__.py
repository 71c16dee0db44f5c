"""`mvmlx benchmark`: what this machine reaches, beside its own limit and beside diffusers."""
