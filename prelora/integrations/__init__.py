"""PreLoRA in other libraries' hands, one module each; each imports its library and is imported by nobody else."""
