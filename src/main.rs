fn main(){println!("x");}
