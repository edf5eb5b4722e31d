"""Again: plan, pacing, prompt text, endpoints, the simulated cluster."""
