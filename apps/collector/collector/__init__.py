"""Takes the containers' logs into files where the official Fluentd image cannot be had."""
