"""The processes of the ranks beside the first, which is the engines' process."""
