"""The hands: the command line and the HTTP face of the simulated cluster."""
