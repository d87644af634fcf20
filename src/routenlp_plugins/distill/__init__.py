"""The distillation loop: cheap tiers are taught what they had to escalate, and promoted only through a gate."""
