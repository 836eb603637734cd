"""Figures of results: matplotlib, one column wide, colours that colour-blind readers tell apart."""
