"""Branch-Train-MiX in JAX: train domain experts of a Llama separately, mix them into one
Mixture-of-Experts, finetune it."""

__version__ = "0.1.0"
