"""What people look at: charts, tables, findings, progress, the parameter panel and the HTML report."""
