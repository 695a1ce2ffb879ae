//! Runs a program of ours that is attached nowhere, on a packet that is sent nowhere (BPF_PROG_TEST_RUN).

use std::io;

use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};

/// TCX_NEXT, as a program's answer is handed out: it has done what it is for.
const NEXT: u32 = u32::MAX;

/// Runs it once. What the program makes of the packet goes to `out`.
pub(super) fn run(
    program: &SchedClassifier,
    packet: &[u8],
    out: &mut [u8],
) -> Result<(), ProgramError> {
    let run = TestRunOptions {
        data_in: Some(packet),
        data_out: Some(out),
        ..TestRunOptions::default()
    };
    match program.test_run(run)?.return_value {
        NEXT => Ok(()),
        _ => Err(io::Error::other("the program refused the packet").into()),
    }
}
