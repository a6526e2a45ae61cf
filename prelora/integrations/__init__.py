"""PreLoRA inside other trainers; each module imports its own library, and ``import prelora`` none of them."""
