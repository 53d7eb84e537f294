"""The compiled passes; see kernels.h for the grammar of their names."""
