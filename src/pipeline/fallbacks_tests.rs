use super::*;

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Progress for Warnings {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {}
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn stop_requested(&self) -> bool {
        false
    }
}

#[test]
fn each_kind_is_one_warning() {
    let (fallbacks, warnings) = (Fallbacks::default(), Warnings::default());
    for (site, tokens) in [("a.mlp_act", 3), ("b.mlp_act", 5), ("c.mlp_act", 7)] {
        let kind = Fallback::FewTokens { wanted: 256 };
        fallbacks.note(kind, site, &format!("{tokens} tokens"));
    }
    fallbacks.note(Fallback::NoFactor, "x.attn_in", "its Hessian is not positive definite");
    fallbacks.warn(&warnings);
    fallbacks.warn(&warnings);
    assert_eq!(
        *warnings.0.lock().unwrap(),
        [
            "3 experts rounded to nearest, since fewer than 256 calibration tokens (`expert_tokens`) \
             came to them: give more with --samples; the first is a.mlp_act: 3 tokens",
            "1 site rounded to nearest instead of GPTQ, since their Hessians have no Cholesky factor \
             at any damping; it is x.attn_in: its Hessian is not positive definite",
        ]
    );
}
