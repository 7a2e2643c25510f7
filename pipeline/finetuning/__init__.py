"""How a network is trained: parameter groups and schedules."""
