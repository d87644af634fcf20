"""What chains did and what people thought of it: kept, and made into outcomes."""
