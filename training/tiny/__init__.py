"""How the embedded models of ``assets/tiny/`` are trained, on ToonWorld, with a CPU."""
