"""Only there to be imported: sd-scripts calls it for sample pictures alone."""
