"""Fusing layers that have no rule: measured, proved, and put in place."""
