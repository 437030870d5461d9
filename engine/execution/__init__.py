"""Carries out what the scheduler decided: workers, model runners and the KV pool's memory."""
