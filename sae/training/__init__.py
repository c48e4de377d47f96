"""How SAEs are trained: losses, one step, a run of several of them."""
