"""Views at twice their size: latent upscaling by a diffusion model, and interpolation for those without its weights."""
