//! The command line from the outside: what it prints where, how it exits, what it leaves behind.

mod basics;
mod common;
mod datasets;
mod experiments;
mod hub;
mod hub_server;
mod layouts;
mod models;
mod runs;
mod tasks;
mod terminal;
