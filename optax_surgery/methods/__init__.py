"""One file a method. Import the methods from `optax_surgery`."""
