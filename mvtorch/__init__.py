"""PyTorch backend of mvmlx, for CUDA and CPU. Every model file has a twin of the same name in mvmlx."""
