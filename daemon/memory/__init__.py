"""RAM: what models may take, what is booked for them, what they really use."""
