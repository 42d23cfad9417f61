"""`RoutedExperts`: every row through the experts that its router prefers (README.md in this folder)."""
