"""Design: factors and their levels, the points of a grid, and the effects that can be told apart."""
