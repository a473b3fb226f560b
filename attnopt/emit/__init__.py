"""An optimized graph to something that a user can hold: a module, a .pt2 file."""
