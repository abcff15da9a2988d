"""Tables, plots, pictures and the HTML page that show what a run did."""
