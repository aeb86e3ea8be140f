"""Recoveries of one instance: candidates with their numbers, and the choice by cost."""
