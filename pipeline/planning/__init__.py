"""Choosing what nobody set, from data, weights, machine and time; each choice has its reason."""
