"""Other people's models, whole: made sparse, trained, saved, read, used to generate, and dense again."""
