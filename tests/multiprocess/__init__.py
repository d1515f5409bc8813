"""Tests with several real processes on this machine (gloo)."""
