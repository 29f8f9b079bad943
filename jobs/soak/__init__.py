"""What `jobs.chaos` is made of: a watched job, strikes, and what is told of them."""
