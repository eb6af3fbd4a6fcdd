"""What people look at: plots, progress, the parameter panel and the HTML report."""
