//! Which pages of the cache are free.

/// The pages of a cache that no sequence has.
#[derive(Clone, Debug)]
pub struct Pages {
    /// Tokens of a page.
    page_tokens: usize,
    all: usize,
    /// The next one last.
    free: Vec<u32>,
}

impl Pages {
    /// `all` free pages of `page_tokens` tokens.
    ///
    /// # Panics
    /// If pages cannot be numbered in 32 bits.
    pub fn new(all: usize, page_tokens: usize) -> Self {
        let last = u32::try_from(all).expect("pages are numbered in 32 bits");
        Self { page_tokens, all, free: (0..last).rev().collect() }
    }

    /// Pages that `tokens` tokens need.
    pub fn needed(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Free ones.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All.
    pub fn all(&self) -> usize {
        self.all
    }

    /// Adds pages to those of a sequence until they have room for `tokens` tokens; false, and nothing is added, where
    /// too few are free.
    pub fn reserve(&mut self, own: &mut Vec<u32>, tokens: usize) -> bool {
        let wanted = self.needed(tokens).saturating_sub(own.len());
        if wanted > self.free.len() {
            return false;
        }
        own.extend(self.free.drain(self.free.len() - wanted..).rev());
        true
    }

    /// Takes the pages of a sequence back.
    pub fn release(&mut self, own: &mut Vec<u32>) {
        self.free.extend(own.drain(..).rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_gets_all_of_its_pages_or_none() {
        let mut pages = Pages::new(5, 16);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        assert!(pages.reserve(&mut first, 33));
        assert_eq!((first.clone(), pages.free()), (vec![0, 1, 2], 2));
        assert!(!pages.reserve(&mut second, 49) && second.is_empty() && pages.free() == 2);
        assert!(pages.reserve(&mut second, 32) && second == [3, 4]);
        // Room for more tokens on the pages at hand takes no page.
        assert!(pages.reserve(&mut first, 48) && first.len() == 3);
        assert!(!pages.reserve(&mut first, 49) && first.len() == 3);
        pages.release(&mut second);
        assert!(pages.reserve(&mut first, 80) && pages.free() == 0);
        pages.release(&mut first);
        assert_eq!(pages.free(), pages.all());
    }
}
