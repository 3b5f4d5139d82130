"""What is read off runs and programs: reports, plans, wire, lists, the survey."""
