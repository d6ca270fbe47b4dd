"""Plans: the table (`table`), how its rows are applied (`rows`), the executor, and a plan unrolled (`unrolled`)."""
