"""Before a call: how likely each tier's answer is good enough."""
