"""How many replicas a model is to have: sizing from what is asked for and measured, and the policy that Serve calls."""
