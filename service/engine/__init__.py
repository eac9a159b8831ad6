"""The engine: schedules requests into steps and runs the steps."""
