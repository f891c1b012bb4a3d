"""What is read off the traced program of a user: which inputs reach which losses."""
