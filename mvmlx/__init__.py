"""MLX backend of mvmlx, for Apple silicon first. Every model file has a twin of the same name in mvtorch."""
