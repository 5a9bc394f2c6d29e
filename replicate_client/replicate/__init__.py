"""Version control for machine learning."""
