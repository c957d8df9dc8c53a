use super::*;

/// Memory of one number that is never touched.
fn one<T>() -> Out<'static, T> {
    // SAFETY: nothing reads or writes it.
    unsafe { Out::one(4096) }
}

#[test]
fn a_slice_holds_as_many_elements_as_its_bytes() {
    assert!(one::<f64>().holds(1) && !one::<f64>().holds(2));
    assert!(one::<f64>().holds(0) && !one::<f64>().holds(usize::MAX));
    let rest = one::<f32>().skip(1);
    assert_eq!((rest.pointer(), rest.holds(1)), (4100, false));
}

#[test]
#[should_panic(expected = "are skipped of 4 bytes")]
fn a_slice_does_not_begin_after_its_end() {
    let _ = one::<f32>().skip(2);
}
