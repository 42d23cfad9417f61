"""What the commands do, one module each: the functions of the public API."""
