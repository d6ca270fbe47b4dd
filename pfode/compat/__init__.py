"""Other libraries' faces: modules with their names and arguments, pfode's solvers behind them."""
