"""What worlds give: demonstrations as LeRobot data sets, and questions about rendered scenes."""
