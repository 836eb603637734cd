"""Trainers turn a recipe into a fitted detector. `plain` is the specification; faster ones owe it parity."""
