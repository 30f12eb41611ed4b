"""Reinforcement learning for text."""
