"""How fast steerlib is, beside other packages and beside what the machine can do."""
