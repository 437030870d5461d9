"""The engine deployment: engine loop, step stream, load, health, drain."""
